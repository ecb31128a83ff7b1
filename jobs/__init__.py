"""Running it: stages over units of work, executors (this process, Ray), the command line and the demo."""
