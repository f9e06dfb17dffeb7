"""Files: every layout that is read or written. Foreign names stop here."""
