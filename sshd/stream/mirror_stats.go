package stream

import (
	"time"
)

// counters are what a mirror did. They are guarded by Mirror.mu.
type counters struct {
	entries, bytes     int64
	gap                int64 // bytes of log
	skipped            int64 // jobs
	errors             int64
	events, eventsLost int64
}

// MirrorStats say how a mirror does. Numbers count since raid started, but for those that
// are of now.
type MirrorStats struct {
	Up      bool      `json:"up"`                // Redis takes writes
	Since   time.Time `json:"since"`             // of that
	Trouble string    `json:"trouble,omitempty"` // the last one, over or not

	Streams int   `json:"streams"`   // jobs whose output is being copied now
	Waiting int   `json:"waiting"`   // jobs with output that wait for Redis now
	Lag     int64 `json:"lag_bytes"` // bytes of log that the streams of unfinished jobs do not have now
	Memory  int64 `json:"memory"`    // bytes that streams take in Redis or may grow to now
	Limit   int64 `json:"limit"`     // of Memory; 0: none

	Entries    int64 `json:"entries"`
	Bytes      int64 `json:"bytes"`       // of data in them
	Gap        int64 `json:"gap_bytes"`   // bytes of log that were skipped because Redis did not take them in time
	Refused    int64 `json:"refused"`     // jobs that found no room when they began
	Skipped    int64 `json:"skipped"`     // jobs that were given up: too many waited, or Redis would not have them
	Events     int64 `json:"events"`      //
	EventsLost int64 `json:"events_lost"` //
	Errors     int64 `json:"errors"`      // calls that failed
}

// Stats says how the mirror does.
func (m *Mirror) Stats() MirrorStats {
	m.mu.Lock()
	m.expireLocked(time.Now())
	c := m.count
	s := MirrorStats{Up: closed(m.up), Since: m.since, Trouble: m.trouble, Memory: m.used, Limit: m.limitLocked(),
		Entries: c.entries, Bytes: c.bytes, Gap: c.gap, Refused: m.refusals, Skipped: c.skipped,
		Events: c.events, EventsLost: c.eventsLost, Errors: c.errors}
	places := map[int64]watch{}
	for id, w := range m.watched {
		if w.runs {
			s.Streams++
		}
		if !w.refused {
			places[id] = *w
		}
	}
	m.mu.Unlock()
	for id, w := range places {
		end, begun := m.spools.peek(id)
		s.Lag += max(end-w.at, 0)
		if !w.runs && (begun || w.begun) {
			s.Waiting++
		}
	}
	return s
}
