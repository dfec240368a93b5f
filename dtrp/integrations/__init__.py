"""dtrp inside other libraries' training loops; each file needs its library (an extra of the same name)."""
