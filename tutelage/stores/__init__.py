"""The one store: PostgreSQL tables, their migrations and the queries over them. It refuses to know any rule."""
