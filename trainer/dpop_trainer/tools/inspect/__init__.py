"""`dpop inspect`: a trained model held against its reference on preference pairs, token by token."""
