"""What the routes do, a file for each kind of caller."""
