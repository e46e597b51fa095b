"""What a person looks at: statistics, tables, sheets."""
