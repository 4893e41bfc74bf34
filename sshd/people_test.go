package sshd

import (
	"context"
	"testing"
)

// Staff see what each raid of a deployment runs.
func TestAdminRaids(t *testing.T) {
	s := newSite(t, func(c *Config) {
		c.Raids = func(context.Context) ([]Raid, error) {
			return []Raid{{Addr: "raid-a:2222", Leads: true, Version: "v1.2.3 (0123456789ab)"}, {Addr: "raid-b:2222"}}, nil
		}
	})
	for command, want := range map[string]string{
		"admin raids": "RAID         VERSION\n" +
			"raid-a:2222  v1.2.3 (0123456789ab)  leads\n" +
			"raid-b:2222  unknown                door\n",
		"admin raids --json": `{"addr":"raid-a:2222","leads":true,"version":"v1.2.3 (0123456789ab)"}` + "\n" +
			`{"addr":"raid-b:2222","leads":false,"version":""}` + "\n",
	} {
		if out, stderr, status := s.say(t, "sam", command, nil); status != 0 || out != want {
			t.Errorf("%s = %d, %q\n%swant\n%s", command, status, stderr, out, want)
		}
	}
}
