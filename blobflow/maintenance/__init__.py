"""What watches over stored artifacts: garbage collection and retention."""
