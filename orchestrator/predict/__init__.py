"""Time and cost to target at sizes that were not run: steps from the fitted law, seconds from a model of one step."""
