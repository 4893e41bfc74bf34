package sshd

import (
	"testing"
	"time"
)

func TestStandingIsNews(t *testing.T) {
	then := time.Unix(1_700_000_000, 0)
	last := standing{position: 3, late: 10 * time.Minute, at: then}
	for _, tt := range []struct {
		name     string
		after    time.Duration
		position int
		late     time.Duration
		want     bool
	}{
		{"another place", time.Second, 2, 10 * time.Minute, true},
		{"time passes as it was said", 4 * time.Minute, 3, 6 * time.Minute, false},
		{"a little later", 4 * time.Minute, 3, 7 * time.Minute, false},
		{"much later", 4 * time.Minute, 3, 12 * time.Minute, true},
		{"much earlier", time.Minute, 3, 3 * time.Minute, true},
		{"seconds at the end", 9*time.Minute + 50*time.Second, 3, 25 * time.Second, false},
	} {
		if got := last.news(standing{tt.position, tt.late, then.Add(tt.after)}); got != tt.want {
			t.Errorf("%s: news = %v, want %v", tt.name, got, tt.want)
		}
	}
	if !(standing{}).news(standing{position: 1, at: then}) {
		t.Error("the first line is no news")
	}
}
