"""What people see: the command line, cards, plans and bars of progress."""
