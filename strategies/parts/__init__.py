"""What strategies are made of and share. No recipe names these; methods that it can name lie beside this folder."""
