"""From files of metadata to lists: rows with a URL, a caption and what is known of both."""
