"""Messages and frames that cross a process boundary, and their codec. Imports nothing of ours."""
