"""Many grammars with a real model: what ends must be right, what does not must have been on its way there."""
