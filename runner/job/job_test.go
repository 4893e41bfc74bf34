package job

import (
	"testing"
	"time"
)

func TestWithin(t *testing.T) {
	old := Limits{Time: time.Hour, Memory: 0, Pids: 100, Output: 5}
	now := Limits{Time: time.Minute, Memory: 1 << 30, Pids: 0, Output: 9}
	want := Limits{Time: time.Minute, Memory: 1 << 30, Pids: 100, Output: 5}
	if got := old.Within(now); got != want {
		t.Errorf("%+v.Within(%+v) = %+v, want %+v", old, now, got, want)
	}
	if got := now.Within(old); got != want {
		t.Errorf("Within depends on the order: %+v", got)
	}
}
