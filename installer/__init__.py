"""What makes Weft a program to double-click: starting from a source folder, and later its installers."""
