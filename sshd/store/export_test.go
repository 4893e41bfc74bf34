package store

// The codec of the log.
var (
	AppendBatch = appendBatch
	ParseBatch  = parseBatch
)

// Places in lists of Redis.
var (
	PlaceText  = placeText
	ParsePlace = parsePlace
)

// Fold brings the rows of a SQLite store up to date now.
func Fold(s Store) error { return s.(*disk).fold() }

// Still calls fn while nothing is written.
func Still(s Store, fn func()) {
	d := s.(*disk)
	d.mu.Lock()
	defer d.mu.Unlock()
	fn()
}
