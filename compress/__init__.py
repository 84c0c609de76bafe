"""The workshop: makes a trained model smaller and faster and proves what that cost."""
