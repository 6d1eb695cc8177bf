"""Searches: where points lie, who wins, who is given up. Pure functions of the recipe and of the results on file."""
