"""Command line: scoresde-train, scoresde-sample, scoresde-likelihood, scoresde-evaluate."""
