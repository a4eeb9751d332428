"""What goes through all rooms: bad input, other programs, random collections, search, load, scale, attacks."""
