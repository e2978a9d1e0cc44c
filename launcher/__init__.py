"""Who drives a run: command line, plan, submission, supervision, progress."""
