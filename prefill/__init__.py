"""The prefill half of a room: compute, retain, offer, release."""
