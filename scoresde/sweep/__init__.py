"""Many runs: the jobs of a sweep, its summary and its page."""
