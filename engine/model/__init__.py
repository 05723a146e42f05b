"""Model families as pure functions, attention and sampling."""
