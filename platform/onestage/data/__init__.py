"""From a folder of annotated images to batches: formats, packing into shards, order, augmentation, loading."""
