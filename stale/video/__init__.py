"""From video files to snippet features: decoding, CLIP's preprocessing, CLIP's image encoder."""
