"""What the tests share: a table, databases, proxies that break the wire, and counted awaits."""
