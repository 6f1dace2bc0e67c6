"""From files to batches: annotation readers, picture loading, collating."""
