"""What runs in which precision: recipes, the graphs that follow them, and the search for one that is good enough."""
