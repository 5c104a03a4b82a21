"""The theory: a forward SDE, what a network's output means, and the estimate (x̂_0, ε̂) of where a path began."""
