package main

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/rai-project/raid/keys/secret"
	"github.com/rai-project/raid/runner/job"
)

// rais begins what RAI's own client encrypted, with a key that raid has not.
const rais = "==AES"

// pushAccount is the account of the profile on the registry that the build file pushes to
// without credentials of its own, as the variable in which raid takes it; nothing if there
// is no such push or no such account. It travels in the session, never on a command line.
func (a *app) pushAccount() []string {
	registry := a.pushesTo()
	account, ok := a.accounts.Account(registry)
	if registry == "" || !ok {
		return nil
	}
	if strings.HasPrefix(account.Username, rais) || strings.HasPrefix(account.Password, rais) {
		a.say("the account of %s in your profile was encrypted for RAI, with a key that raid has not; write it anew", registry)
		return nil
	}
	if !secret.Is(account.Password) && a.accounts.Exposed() {
		a.say("others can read your profile, which holds a password: chmod 600 it")
	}
	return []string{job.PushEnv + "=" + job.FormatPush(registry, job.Credentials{Username: account.Username, Password: account.Password})}
}

// pushesTo returns the registry. What is wrong with a build file raid says.
func (a *app) pushesTo() string {
	file := a.build
	if file == "" {
		file = filepath.Join(a.path, buildFile)
	}
	if i, err := os.Stat(file); err != nil || i.Size() > job.MaxBuildFile {
		return ""
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	b, _, err := job.ParseBuild(text)
	if err != nil || b.BuildImage == nil || b.BuildImage.Push == nil || b.BuildImage.Push.Username != "" || b.BuildImage.Push.Password != "" {
		return ""
	}
	order, err := b.BuildImage.Order()
	if err != nil || order.Push == nil {
		return ""
	}
	return order.Push.Registry
}
