"""What every kind of training needs: optimizer, run folder, checkpoints."""
