"""Kill, cut, stall: nothing may be missing afterwards."""
