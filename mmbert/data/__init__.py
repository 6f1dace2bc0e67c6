"""From files to batches: annotation readers, image loading, collating."""
