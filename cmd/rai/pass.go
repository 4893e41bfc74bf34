package main

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys/dial"
)

// pass runs one of raid's commands as it was typed.
func (a *app) pass(ctx context.Context, name string, args []string) error {
	args, err := a.takeOwn(args)
	if err != nil {
		return err
	}
	if a.dashed {
		args = append(append(args, "--"), a.tail...)
	}
	if (name == "output" || name == "source") && isTerminal(a.out) {
		return cli.Usagef("send it on: rai "+name+" JOB | tar xf -", "%s writes a tar, which is no sight for a terminal", name)
	}
	if name == "output" && len(args) > 1 {
		args[1] = filepath.ToSlash(args[1]) // from Windows
	}
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	var stdin io.Reader
	if readsInput(name) && !isTerminal(a.in) {
		stdin = a.in
	}
	status, err := c.Run(ctx, quote(append([]string{name}, args...)), stdin, a.out, a.err)
	if errors.Is(err, dial.ErrLost) && name == "attach" {
		return cli.Fail(cli.Connect, err, "the job goes on; the same line again follows it")
	}
	if err != nil {
		return err
	}
	return result(status)
}

// readsInput names the commands that take something on stdin. The others must not eat
// the input of a script's loop.
func readsInput(name string) bool { return name == "keys" || name == "admin" }

// result is nil for success.
func result(status int) error {
	if status == 0 {
		return nil
	}
	return errStatus(status)
}

// takeOwn takes the flags that say where raid is out of a command's words: people put
// them last, and raid has none of these names.
func (a *app) takeOwn(args []string) (rest []string, err error) {
	own := map[string]*string{"--server": &a.server, "--identity": &a.identity, "--profile": &a.profile, "--known-hosts": &a.known}
	for i := 0; i < len(args); i++ {
		name, value, hasValue := strings.Cut(args[i], "=")
		into := own[name]
		if into == nil {
			rest = append(rest, args[i])
			continue
		}
		if !hasValue {
			if i++; i == len(args) {
				return nil, cli.Usagef("", "%s needs a value", name)
			}
			value = args[i]
		}
		*into = value
	}
	return rest, nil
}

var plain = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// quote joins words so that a POSIX shell, and raid, parts them again.
func quote(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		if !plain.MatchString(w) {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		out[i] = w
	}
	return strings.Join(out, " ")
}
