"""Side-by-side runs against what a user would pick instead. Nothing that ships imports this; see README.md."""
