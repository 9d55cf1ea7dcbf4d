"""What a step will do and hold, from shapes alone: nothing is allocated, nothing is sent."""
