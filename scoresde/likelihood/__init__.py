"""Likelihoods of data under a model: along the probability-flow ODE, as bounds, and of classes by Bayes' rule."""
