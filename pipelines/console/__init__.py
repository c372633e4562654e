"""What every command shares: arguments and errors, tables, record files, named versions."""
