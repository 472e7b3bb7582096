"""One solver a file, all behind one signature."""
