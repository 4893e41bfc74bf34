package cluster

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/rai-project/raid/keys/dial/dialtest"
	"github.com/rai-project/raid/sshd/store"
)

// TestDirectory: while Redis does not answer, one waits for it and those after do not, until
// it is asked again; that it knows nobody by a key is an answer.
func TestDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raid, stranger := dialtest.Signer(t).PublicKey(), dialtest.Signer(t).PublicKey()
		there, asked := true, 0
		d := directory{known: map[string]store.Member{}, ask: func(ctx context.Context, print string) (store.Member, error) {
			asked++
			switch {
			case !there:
				<-ctx.Done()
				return store.Member{}, errors.Join(store.ErrUnavailable, ctx.Err())
			case print == ssh.FingerprintSHA256(raid):
				return store.Member{Key: line(raid)}, nil
			}
			return store.Member{}, store.ErrNoMember
		}}
		find := func(what string, key ssh.PublicKey, want bool, after time.Duration, asks int) {
			t.Helper()
			start, before := time.Now(), asked
			if got := d.find(t.Context(), key); got != want || time.Since(start) != after || asked-before != asks {
				t.Errorf("%s: find = %v after %v and %d questions, want %v after %v and %d",
					what, got, time.Since(start), asked-before, want, after, asks)
			}
		}
		find("a stranger", stranger, false, 0, 1)
		find("a stranger again", stranger, false, 0, 1)
		there = false
		find("the first while Redis hangs", stranger, false, askTime, 1)
		find("the next", raid, false, 0, 0)
		there = true
		find("the next, though Redis is back", raid, false, 0, 0)
		time.Sleep(askPause)
		find("a raid after a pause", raid, true, 0, 1)
		find("a raid that is known", raid, true, 0, 0)
		d.learn(map[string]store.Member{})
		find("a raid that was forgotten", raid, true, 0, 1)
		there = false
		d.learn(map[string]store.Member{})
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		d.find(gone, stranger) // whoever hangs up says nothing of Redis
		find("after one who hung up", stranger, false, askTime, 1)
	})
}
