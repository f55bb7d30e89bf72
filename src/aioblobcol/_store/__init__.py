"""Object stores: the protocol (`_base`), metadata that survives (`_metadata`), S3 (`_s3`)."""
