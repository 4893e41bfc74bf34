package store_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rai-project/raid/sshd/queue"
	"github.com/rai-project/raid/sshd/store"
)

// TestRedisDefaultUser: that jobs are lost when Redis starts again is told before, by what
// its user default may do.
func TestRedisDefaultUser(t *testing.T) {
	const asks = leastACL + " +info +config|get"
	for _, tt := range []struct {
		name, byDefault, raid string
		forgets               bool
		warning               string // a part, "" for none
	}{
		{"off alone", "off", asks + " +acl|dryrun", true, "jobs are lost when it starts again"},
		{"reads only", "on >other ~* +@read", asks + " +acl|dryrun", true, "jobs are lost when it starts again"},
		{"other keys", "off ~other:* &* +@all", asks + " +acl|dryrun", true, "jobs are lost when it starts again"},
		{"as advised", "off ~* &* +@all", asks + " +acl|dryrun", false, ""},
		{"not asked", "off ~* &* +@all", asks, false, "may not be asked whether it finds the jobs again"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "acl")
			if err := os.WriteFile(file, []byte("user default "+tt.byDefault+"\nuser raid on >pw "+tt.raid+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			s := startRedis(t, "--aclfile", file)
			url := strings.Replace(s.url("name=acl"), "unix://", "unix://raid:pw@", 1)
			if _, err := openURL(t, url).Commit(t.Context(), 0, numbered(0)); err != nil {
				t.Fatal(err)
			}
			f, err := store.ExamineRedis(t.Context(), url)
			if err != nil || f.Forgets != tt.forgets {
				t.Errorf("ExamineRedis = %+v, %v, want Forgets %v", f, err, tt.forgets)
			}
			_, warnings := f.Judge(url)
			if (tt.warning == "") != (len(warnings) == 0) || !strings.Contains(fmt.Sprint(warnings), tt.warning) {
				t.Errorf("warned of %q, want %q", warnings, tt.warning)
			}
			s.kill()
			s.start()
			rows := 0
			if _, err := openURL(t, url).Load(t.Context(), []string{"many"}, func(queue.Row) error { rows++; return nil }); err != nil {
				t.Fatal(err)
			}
			lost := rows == 0
			if lost && !tt.forgets || !lost && tt.forgets && strings.HasPrefix(f.Version, "7.0.") { // newer ones mend it
				t.Errorf("its rows are lost after a restart: %v, want %v", lost, tt.forgets)
			}
		})
	}
}
