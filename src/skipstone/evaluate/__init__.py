"""Floor 4: measuring what a model does: quality, cost, speed."""
