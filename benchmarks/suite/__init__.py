"""The benchmark suite: this library beside its peers and beside the limit, in one run.

`plan` names what is compared, `driver` lets the contenders take turns, each in a child process
(`child`), against the S3 server of `stub`; `goals` judges and `report` writes it down. What is
compared in a goal comes from the same run: machines differ, ratios hardly do.
"""
