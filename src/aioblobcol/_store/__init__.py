"""Object stores: the protocol (`_base`), metadata that survives (`_metadata`), S3 (`_s3`).

`_presign` holds what presigned URLs and names of downloads have in common.
"""
