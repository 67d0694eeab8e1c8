"""`dpop compare`: the same model, data and seeds under several losses, and one report."""
