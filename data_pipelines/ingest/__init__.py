"""Ways into a user's data: folders, lists, class folders, packing into shards."""
