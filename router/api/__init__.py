"""The APIs that clients speak: how their requests are read and their answers written."""
