"""One file a question; ``benchmarks.harness.question`` says what such a file holds."""
