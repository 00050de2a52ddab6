"""What people read of a run: live progress, tables."""
