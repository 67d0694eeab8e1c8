"""MT-Bench in FastChat's file formats: answers of a model, and their grades by a judge that the user names."""
